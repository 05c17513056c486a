"""Speed and memory side by side: each figure is measured in a process of its own, contenders in turn."""
