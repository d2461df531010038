"""p(z): what z is drawn from when no text is given, one prior a file."""
