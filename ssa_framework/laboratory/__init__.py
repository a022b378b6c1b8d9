"""What sparse attention does to a language model. Every measurement is a function that returns plain data."""
