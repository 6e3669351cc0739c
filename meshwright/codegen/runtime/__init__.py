"""Short pieces that an emitted script imports; emit copies this folder beside it. They need torch and nothing of meshwright."""
