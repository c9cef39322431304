"""What surrounds a run and knows no kernel; a part of the program."""
