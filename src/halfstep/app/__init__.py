"""How people use it: opening a subject, the verbs, the studio, the command line."""
