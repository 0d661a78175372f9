"""What a call is given beside the backbone's own inputs: rows, tasks, labels, what to show."""
