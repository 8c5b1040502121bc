"""Linear layers of s8 codes and low-bit weights with group scales, and the kernel that finds the codes at run time."""
