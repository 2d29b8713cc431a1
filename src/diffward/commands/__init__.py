"""One typed function a command; nothing else lives here."""
