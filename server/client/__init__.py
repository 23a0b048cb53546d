"""What runs beside a server and speaks HTTP to it."""
