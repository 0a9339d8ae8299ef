"""What is trained, and the frozen model beside it: built, begun with, written, merged."""
