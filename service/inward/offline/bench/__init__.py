"""Speed, always as a ratio measured in one run beside what a user would do instead."""
