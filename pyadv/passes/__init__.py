"""Passes through the user's network: borrowing it, and computing the same at a lower price."""
