"""第 4 章：经典 CNN——从六重循环的卷积到 LeNet、AlexNet 与 VGG。"""
