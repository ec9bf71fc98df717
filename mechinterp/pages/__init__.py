"""What every page and report shares: templates that escape, numbers as people write them, heat pictures, places."""
