"""Other implementations that the tests compare with, and how they are imported."""
