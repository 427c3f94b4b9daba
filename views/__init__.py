"""Photos in, camera paths, pictures out. Here is what a command line says of them before torch."""

# name: (how far it goes unless told, what it does, with that default)
MOTIONS = {
    "orbit": (360.0, "circle around the scene, by 360 degrees"),
    "swing": (20.0, "circle to and fro, by 20 degrees to each side"),
    "spiral": (0.25, "two turns in front of the scene, out to 0.25 and back"),
    "dolly": (0.4, "forwards by 0.4"),
    "truck": (0.4, "to the right by 0.4"),
    "pedestal": (0.3, "upwards by 0.3"),
    "pan": (30.0, "turn to the right on the spot, by 30 degrees"),
    "tilt": (20.0, "turn upwards on the spot, by 20 degrees"),
    "zoom": (1.5, "stay, and narrow the field of view until things look 1.5 times as large"),
}
STEEPEST = 89.0                 # degrees of elevation; straight above, no direction is "up"
FOV = 52.55                     # degrees; what ZeroNVS's own inference takes a photo to have
SCALE = 0.7                     # ZeroNVS's own inference
