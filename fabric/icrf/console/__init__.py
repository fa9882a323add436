"""What the commands show: live where there is a terminal, plain lines where there is none."""
