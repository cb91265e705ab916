"""What the scripts are made of: flags, losses, the loop, files, reports."""
