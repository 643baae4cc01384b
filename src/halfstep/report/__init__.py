"""What people read of a measurement: words, tables, figures, and the page that holds them."""
