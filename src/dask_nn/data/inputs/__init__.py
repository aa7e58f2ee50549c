"""Any collection that users have, read as named arrays of rows."""
