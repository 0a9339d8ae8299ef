"""Adapters and the frozen model beside them: built, begun with, written, merged."""
