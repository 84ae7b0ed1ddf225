"""Times training steps of this package against TRL's, in turn, on the same rows. See docs/performance.md."""
