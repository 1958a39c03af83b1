"""What training code does to a reversible network, library by library."""
