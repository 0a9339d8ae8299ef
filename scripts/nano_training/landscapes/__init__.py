"""Landscapes, the second kind of picture that krea2-nano learns: scenes, drawing, words, judge."""
