"""Reports of conversions, comparisons and plans: a page for people, and its data as JSON."""
