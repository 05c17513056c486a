"""Speed and memory of models side by side. Each measurement runs in a new process; contenders take turns."""
