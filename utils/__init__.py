"""通用工具箱：设备、种子、计时、模型摘要、文件读写、命令行、数据与画图。

这里只有"仪式"，没有任何神经网络代码。常用的轻量名字可以直接 ``from utils import ...``；
数据集、画图等较重的模块按全名导入，用到才加载。
"""

from utils.cli import UserError, add_common_args, run_main
from utils.device import TorchDevice, get_device
from utils.file_io_util import REPO_ROOT, load_json, prepare_out_dir, save_json
from utils.model_summary import count_parameters, model_summary, trace_shapes
from utils.seed import make_generator, set_seed
from utils.timer import Timer
from utils.verdict import Expectation, Result, conclude

__all__ = [
    "REPO_ROOT",
    "Expectation",
    "Result",
    "Timer",
    "TorchDevice",
    "UserError",
    "add_common_args",
    "conclude",
    "count_parameters",
    "get_device",
    "load_json",
    "make_generator",
    "model_summary",
    "prepare_out_dir",
    "run_main",
    "save_json",
    "set_seed",
    "trace_shapes",
]
