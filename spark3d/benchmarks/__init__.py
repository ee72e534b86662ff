"""What packed cells are compared with, and how: see docs/performance.md."""
