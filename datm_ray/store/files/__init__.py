"""Files by path or URI: local disks, S3 and other object stores, and the causes of their errors."""
