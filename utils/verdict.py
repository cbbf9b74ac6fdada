"""「学会」的定义：训练之前说清机会线、理论极限与预期区间，训练之后下结论。"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from utils.device import peak_rss_mib
from utils.file_io_util import save_json
from utils.timer import Timer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Expectation:
    """对一个指标的预期。

    参数:
        metric: 指标的名字，如 ``测试准确率``。
        chance: 机会线，什么也没学到的模型（乱猜、总报均值）的得分。
        band: 预期区间（较差端, 较好端），由多次实测得出；达到较差端即为「学会了」。
        floor: 理论极限，任何模型都不可能超过的得分（贝叶斯误差、噪声方差……）；未知时为 ``None``。
        tolerance: 有限样本使得分偶尔略优于 ``floor`` 的余量；超出余量说明数据泄漏或算错了。
        percent: 是否以百分数显示。
        learning: 为假时是一次核对而不是学习：须落在预期区间之内（太好也不行），
            结论说「符合预期」而不是「学会了」。
    """

    metric: str
    chance: float
    band: tuple[float, float]
    floor: float | None = None
    tolerance: float = 0.0
    percent: bool = False
    learning: bool = True

    @property
    def higher_is_better(self) -> bool:
        """方向由机会线与预期区间的相对位置决定。"""
        return self.band[0] > self.chance

    def format(self, value: float | None) -> str:
        """一个得分的显示形式。"""
        if value is None:
            return "未知"
        return f"{100 * value:.2f}%" if self.percent else f"{value:.4g}"

    def format_band(self) -> str:
        """预期区间的显示形式，由小到大。"""
        low, high = map(self.format, sorted(self.band))
        return low if low == high else f"{low} ~ {high}"

    def announce(self) -> str:
        """训练之前打印的一行。"""
        return (
            f"预期  {self.metric}：机会线 {self.format(self.chance)}，"
            f"理论极限 {self.format(self.floor)}，预期区间 {self.format_band()}"
        )

    def learned(self, value: float) -> bool:
        """是否学会：得分有限、达到预期区间的较差端，且没有好得可疑；核对则须在区间之内。"""
        if not math.isfinite(value) or self._suspicious(value):
            return False
        if not self.learning:
            return min(self.band) <= value <= max(self.band)
        return value >= self.band[0] if self.higher_is_better else value <= self.band[0]

    def _suspicious(self, value: float) -> bool:
        if self.floor is None:
            return False
        excess = value - self.floor if self.higher_is_better else self.floor - value
        return excess > self.tolerance

    def mark(self, value: float) -> str:
        """结论：学会了 / 没学会（核对则为 符合预期 / 不符合预期）。"""
        good, bad = ("学会了", "没学会") if self.learning else ("符合预期", "不符合预期")
        mark = good if self.learned(value) else bad
        if math.isfinite(value) and self._suspicious(value):
            mark += "：优于理论极限，请查数据泄漏或指标算错"
        return mark

    def record(
        self, value: float, std: float | None = None, baseline: float | None = None
    ) -> dict[str, Any]:
        """写进 ``metrics.json`` 的一项。

        参数:
            value: 得分；多个种子时为平均。
            std: 多个种子的样本标准差。
            baseline: 对照模型的得分。
        """
        return {
            "metric": self.metric,
            "value": value,
            "std": std,
            "baseline": baseline,
            "chance": self.chance,
            "floor": self.floor,
            "band": list(self.band),
            "percent": self.percent,
            "learned": self.learned(value),
            "mark": self.mark(value),
        }


class Result(NamedTuple):
    """一项结果：预期、得分、多个种子的样本标准差、对照模型的得分。"""

    expectation: Expectation
    value: float
    std: float | None = None
    baseline: float | None = None


def conclude(
    out_dir: Path,
    results: Sequence[Result],
    timer: Timer,
    *,
    smoke: bool = False,
    figures: Mapping[str, Figure] | None = None,
    **details: Any,
) -> dict[str, Any]:
    """一次运行的收尾：存图，写 ``metrics.json``，打印用时与结论。

    参数:
        out_dir: 输出文件夹。
        results: 若干 ``Result``。
        timer: 已结束的计时器。
        smoke: ``--smoke`` 只检查代码路径，不作判定，``learned`` 记为 ``None``。
        figures: 文件名 -> 图。
        details: 一并写进 ``metrics.json`` 的其他内容（曲线、各次的得分……）。

    返回:
        写进 ``metrics.json`` 的字典。
    """
    from utils.plot import save_figure  # 画图时才需要 matplotlib

    for name, figure in (figures or {}).items():
        print(f"图    {save_figure(figure, out_dir / name)}")
    memory = peak_rss_mib()
    records = [r.expectation.record(r.value, r.std, r.baseline) for r in results]
    if smoke:
        records = [record | {"learned": None, "mark": "未判定"} for record in records]
    metrics = {
        "results": records,
        "seconds": timer.elapsed,
        "peak_rss_mib": memory,
        "threads": torch.get_num_threads(),
        **details,
    }
    save_json(out_dir / "metrics.json", metrics)
    print(f"用时  {timer.elapsed:.1f} 秒，内存峰值 {memory:.0f} MiB")
    if smoke:
        print("结论  --smoke 只检查代码路径，不作判定")
        return metrics
    for expectation, value, *_ in results:
        shown = expectation.format(value)
        print(f"结论  {expectation.metric} {shown} -> {expectation.mark(value)}")
    return metrics
