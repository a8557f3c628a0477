"""What a run tells about itself: metrics, timings, where they are written, progress, samples and closing tables."""
