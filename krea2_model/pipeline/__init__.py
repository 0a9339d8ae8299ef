"""`Krea2Pipeline`: parts and stages of a run, its forecast, grids and the detailer."""
