"""Is the copy the original? Checks and bounds, stored external values, mutations."""
