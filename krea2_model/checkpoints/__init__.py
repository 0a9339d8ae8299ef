"""Files of every layout and format, and the parts that are loaded from them."""
