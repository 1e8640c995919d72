"""What is shown of evaluated networks: tables, pictures, the page."""
