"""A reward that a server gives, asked over HTTP."""
