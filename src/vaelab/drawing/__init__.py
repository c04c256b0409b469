"""What is drawn of a run: kinds of pictures, what they are made of, and the bytes of a file."""
