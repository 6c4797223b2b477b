"""The demo model: procedural clips, and the training of a small Wan2.2 image-to-video pipeline on them."""
