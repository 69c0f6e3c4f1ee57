"""Images on their way into a network: batches in main memory or on the device, their augmentation, and resampling."""
