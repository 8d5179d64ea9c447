"""Small real models and tasks to try a method on, and how each was made."""
