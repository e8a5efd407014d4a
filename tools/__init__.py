"""Programs of the house: generated code, locks, tools that tests need. Nothing here ships."""
