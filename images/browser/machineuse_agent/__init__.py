"""What runs in a browser instance: starts screen and browser, keeps them up, and lets clients in by two doors.

Standard library only, Python 3.10 or newer: the image has nothing else.
"""
