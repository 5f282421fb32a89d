"""A seeded search for inputs that pyadv gets wrong in silence. See docs/hostile-inputs.md."""
