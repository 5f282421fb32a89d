"""The loop of gradient attacks and its parts, for attacks of one's own."""
