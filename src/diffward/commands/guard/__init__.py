"""`diffward guard COMMAND`: one typed function a command, as one level up."""
