"""How people use it: opening a subject, the verbs, the report, the command line."""
