"""Kills, flipped bits, cut files and full disks, on the files of a whole study at its smallest."""
