"""``dspark-export validate``: is the bundle still the model, and does speculation keep its text?"""
