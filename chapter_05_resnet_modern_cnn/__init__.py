"""第 5 章：ResNet 与现代 CNN。"""
