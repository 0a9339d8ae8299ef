"""What krea2-nano is trained on and judged by: flat-colour scenes and their captions."""
