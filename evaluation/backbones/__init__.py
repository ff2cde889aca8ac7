"""Networks that look at videos, with parameters named as in their files, and where those files are."""
