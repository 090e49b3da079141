"""Nothing of the papers but DSeq-JEPA's Table 2 and fine-tuning: one loop, and a file a task."""
