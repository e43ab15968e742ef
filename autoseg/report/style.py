"""The look of the page: system fonts, light and dark, narrow and wide, screen and paper."""

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1b2026;--muted:#5a6570;--line:#dfe4e9;--card:#f5f7f9;--accent:#0b6aa8;
--good:#0a7a55;--fair:#8a6100;--poor:#b3400a}
@media (prefers-color-scheme:dark){:root{--bg:#14171b;--ink:#e4e8ec;--muted:#9aa6b2;--line:#2d343b;--card:#1c2127;
--accent:#62b5ea;--good:#4cc79a;--fair:#e3b341;--poor:#f08a5a}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
-webkit-text-size-adjust:100%}
header,main,footer{max-width:1120px;margin:0 auto;padding:0 20px}
header{padding-top:28px}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:44px 0 10px;padding-top:14px;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:22px 0 6px;overflow-wrap:anywhere}
p{margin:6px 0 12px;max-width:72ch;overflow-wrap:anywhere}
a{color:var(--accent)}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin:18px 0 0}
.muted,figcaption,nav{color:var(--muted);font-size:.9rem}
.note{border-left:3px solid var(--fair);padding:6px 12px;background:var(--card);border-radius:0 6px 6px 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:10px;margin:18px 0}
.tile{background:var(--card);border-radius:8px;padding:10px 14px;min-width:0;overflow-wrap:anywhere}
.tile b{display:block;font-size:1.15rem;line-height:1.3;font-variant-numeric:tabular-nums}
.tile span{color:var(--muted);font-size:.85rem}
.tile.main b{font-size:2rem;color:var(--accent)}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums;min-width:100%}
th,td{padding:5px 14px 5px 0;text-align:left;border-bottom:1px solid var(--line);vertical-align:middle;
white-space:nowrap}
thead th{color:var(--muted);font-weight:500;font-size:.85rem}
tbody th{font-weight:600}
td.wrap,table.plan td,table.wrap td,table.wrap th{white-space:normal;overflow-wrap:anywhere}
.right td:nth-child(n+4),.right thead th:nth-child(n+4),.crops td:nth-child(n+5){text-align:right}
.crops td:nth-child(4),.crops thead th:nth-child(4){text-align:left}
.bar{display:inline-block;width:96px;height:9px;background:var(--line);border-radius:2px;margin-right:8px;vertical-align:middle}
.bar i{display:block;height:100%;border-radius:2px;print-color-adjust:exact;-webkit-print-color-adjust:exact}
.chip{display:inline-block;width:13px;height:13px;border-radius:3px;margin-right:7px;vertical-align:-1px;
border:1px solid #0004;print-color-adjust:exact;-webkit-print-color-adjust:exact}
.hatch{background:repeating-linear-gradient(45deg,#888 0 2px,transparent 2px 5px)}
.num-tag{color:var(--muted);font-weight:400;margin-right:5px}
.good{color:var(--good)}.fair{color:var(--fair)}.poor{color:var(--poor)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:3px 18px;padding:0;margin:8px 0;font-size:.9rem}
.legend li{overflow-wrap:anywhere;max-width:100%}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(330px,100%),1fr));gap:8px 26px}
figure{margin:0;min-width:0}
svg{display:block;font-family:inherit}
svg.panel text{font-weight:700}
svg text{fill:var(--muted);font-size:11px}
.chart{width:100%;height:auto;max-width:560px}
.spark{display:inline-block;vertical-align:middle}
.grid{stroke:var(--line);stroke-width:1}
.curve{fill:none;stroke-linejoin:round;stroke-linecap:round}
.frame{fill:none;stroke:var(--line)}
.cells{image-rendering:pixelated}
.close{display:none}
figure:target{position:fixed;inset:0;z-index:9;background:var(--bg);padding:10px;overflow:auto}
figure:target .panel{width:auto;max-width:100%;height:calc(100vh - 70px);margin:auto}
figure:target .close{display:block;font-size:1.1rem;margin:0 0 6px}
.defs{position:absolute;width:0;height:0}
.panels{display:grid;grid-template-columns:repeat(4,minmax(0,1fr));gap:10px}
.panel{width:100%;height:auto;border-radius:4px;background:#000}
.panel .tag{fill:#fff;stroke:#000;stroke-width:.2em;paint-order:stroke;stroke-linejoin:round}
.panel .plate{fill:#000b}.panel .bar-line,.panel .bar-text{fill:#fff}
.shares{display:grid;grid-template-columns:auto minmax(90px,1fr) auto;gap:3px 12px;
align-items:center;
font-size:.92rem;font-variant-numeric:tabular-nums;max-width:820px}
.shares>*{min-width:0;overflow-wrap:anywhere}
.track{height:13px;border-radius:2px;
background:repeating-linear-gradient(90deg,var(--line) 0 1px,var(--card) 1px calc(100%/var(--decades)))}
.track i{display:block;height:100%;border-radius:2px;background:var(--accent);print-color-adjust:exact;
-webkit-print-color-adjust:exact}
.scale{display:flex;justify-content:space-between;color:var(--muted);font-size:.75rem;white-space:nowrap}
details{margin:10px 0}
summary{cursor:pointer;color:var(--accent)}
pre{background:var(--card);border-radius:6px;padding:10px 14px;margin:6px 0;
font:.88rem/1.5 ui-monospace,Consolas,monospace}
.user{color:var(--accent)}
footer{color:var(--muted);font-size:.85rem;padding-top:30px;padding-bottom:40px}
@media (max-width:760px){
header,main,footer{padding-left:16px;padding-right:16px}
.panels{grid-template-columns:repeat(2,minmax(0,1fr))}
.tiles{grid-template-columns:repeat(2,minmax(0,1fr))}
.bar{width:64px}
}
@media screen and (max-width:760px){
table.plan thead{display:none}
table.plan tr{display:block;padding:8px 0;border-bottom:1px solid var(--line)}
table.plan th,table.plan td{display:block;border:0;padding:0;white-space:normal;overflow-wrap:anywhere}
table.plan td:nth-child(3),table.plan td:nth-child(4){color:var(--muted);font-size:.88rem}
}
@media print,(min-width:761px){table.plan{table-layout:fixed}table.plan th{white-space:normal;overflow-wrap:anywhere}
table.plan th:first-child{width:25%}table.plan thead th:nth-child(2){width:19%}
table.plan thead th:nth-child(4){width:19%}}
@media print{
:root{--bg:#fff;--ink:#000;--muted:#444;--line:#ccc;--card:#f4f4f4;--accent:#0b6aa8;color-scheme:light}
html{font-size:11px}body{font-size:1rem}nav{display:none}.panels{grid-template-columns:repeat(4,minmax(0,1fr))}
details::details-content{content-visibility:visible;display:block;block-size:auto}
figure,tr,.tile{break-inside:avoid}h2,h3{break-after:avoid}.scroll{overflow:visible}
.matrix{max-width:100%;height:auto}pre{white-space:pre-wrap}
}
"""
