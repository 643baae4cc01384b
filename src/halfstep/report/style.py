"""How a page looks: wide and narrow, in the light, in the dark and on paper, without a script or anything fetched."""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--ink:#1f2430;--soft:#566070;--paper:#fbfbfd;--card:#f1f3f6;--line:#dfe4ec;
--tint:#fdefe9;
--go:#b83b0b;--beat:#8a5a06;--beaten:#fbf3e2}
@media screen and (prefers-color-scheme:dark){:root{--ink:#e8eaf0;--soft:#a9b1bf;--paper:#14161c;--card:#1d2029;
--line:#2d323d;--tint:#37231b;--go:#fb9168;--beat:#e0b04c;--beaten:#2a2418}}
*{box-sizing:border-box}html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
main,body>footer{max-width:1148px;margin:0 auto;padding:40px 24px}body>footer{padding-top:0}
h1{font-size:1rem;font-weight:600;color:var(--soft);margin:0 0 10px}h2{font-size:1.2rem;line-height:1.3;
margin:0 0 12px}
section,details{margin-top:52px}
.lead{font-size:1.7rem;line-height:1.32;letter-spacing:-.012em;font-weight:600;margin:0;max-width:34em;
text-wrap:pretty}
.note,footer{color:var(--soft);font-size:.875rem}.note{margin:10px 0 0;max-width:72em}
.wrong,.todo{margin:18px 0 0;padding:10px 16px;border-left:4px solid var(--soft);background:var(--card);
max-width:60em}
.wrong{border-color:var(--go);background:var(--tint)}
code{font:600 .94em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.unseen{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.numbers{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:14px;margin:28px 0 0}
.numbers div{background:var(--card);border-radius:10px;padding:14px 18px;display:flex;flex-direction:column}
.numbers dt{order:2;font-size:.94rem;font-weight:600}.numbers dd{display:contents}
.numbers b{order:1;font-size:2.1rem;line-height:1.2;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.numbers span{order:3;color:var(--soft);font-size:.875rem}
.wide{overflow-x:auto}.wide:focus-visible{outline:2px solid var(--go);outline-offset:4px}
table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{padding:8px 12px;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
thead th,thead td{vertical-align:bottom}thead th,caption{color:var(--soft);font-weight:600;text-align:left}
td.n{white-space:nowrap}td:not(.n){min-width:8em}thead th.n{min-width:4.6em}tbody th{font-weight:600;min-width:8.5em}
caption{font-size:.92rem;padding:0 0 8px}
th.n,td.n{text-align:right;font-variant-numeric:tabular-nums}
.best th,.best td{background:var(--tint);font-weight:600}.best th{color:var(--go)}
.beat th,.beat td{background:var(--beaten);border-top:2px dashed var(--beat);border-bottom:2px dashed var(--beat)}
.beat th{color:var(--beat)}
figure{margin:0}img,svg{display:block;max-width:100%;height:auto}img{border-radius:6px}
.hard{image-rendering:pixelated}.drawn svg{width:100%}.drawn{max-width:880px}.slim{display:none}
.grids{display:grid;gap:0 32px}.grid img{width:100%;border-radius:6px}
@media(min-width:1000px){.grids{grid-template-columns:1fr 1fr}}
.beside p{margin:14px 0 6px;font-size:.92rem}.row{display:grid;grid-template-columns:repeat(8,1fr);gap:8px}
.row img{width:100%}
.lanes p{display:flex;justify-content:space-between;flex-wrap:wrap;gap:0 16px;margin:14px 0 5px;font-size:.92rem}
.lanes span{color:var(--soft);font-variant-numeric:tabular-nums}.lanes .own b,.lanes .own span{color:var(--go)}
.lanes .own span{font-weight:600}.track{background:var(--card);border-radius:4px}
.bars{display:flex;height:34px;gap:2px;min-width:3px}.bars.close{gap:1px}
.bars i{flex-basis:0;min-width:0;border-radius:2px}
.guide{background-image:repeating-linear-gradient(135deg,#fff8 0 2px,transparent 2px 7px)}
.steps{margin-top:26px;width:auto;min-width:min(100%,700px)}.steps th,.steps td{padding:4px 14px 4px 0}
.steps td:not(.n),.steps th,.steps thead th.n{min-width:0}.steps td.price{width:44%;min-width:60px;padding-right:0}
.steps .price i{display:inline-block;height:15px;border-radius:2px;vertical-align:middle}
.clock{display:flex;flex-wrap:wrap;align-items:center;gap:6px 14px;font-size:.94rem}.clock label{font-weight:600}
.clock input{flex:1 1 220px;accent-color:var(--go);min-height:28px}
.clock output{min-width:5.5em;font-variant-numeric:tabular-nums}
.clock button{font:inherit;color:inherit;background:var(--card);border:1px solid var(--soft);border-radius:6px;
padding:3px 16px;min-height:32px;cursor:pointer}
.screens{display:grid;grid-template-columns:repeat(auto-fit,minmax(260px,1fr));gap:16px;margin:14px 0 28px}
.screen{overflow:hidden;border-radius:6px}.screen img{width:100%;border-radius:0}
.screens figcaption{font-size:.875rem;margin-bottom:5px}.now{color:var(--soft);font-variant-numeric:tabular-nums}
.film{width:auto}.film th,.film td{padding:4px 10px 4px 0;border:0}.film th{padding-top:12px}
.film img{width:112px;max-width:none}.film span,.plate span{display:block;font-size:.8rem;color:var(--soft);
font-variant-numeric:tabular-nums;white-space:normal;max-width:112px;line-height:1.35;margin-top:3px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:6px 24px;margin:12px 0;font-size:.94rem}dt{font-weight:600}
dd{margin:0;overflow-wrap:anywhere}a{color:var(--go)}summary{cursor:pointer;font-weight:600;padding:6px 0}
.plate td:not(.n),.film td:not(.n){min-width:0}.plate{width:auto}.plate th,.plate td{padding:4px 10px 4px 0;border:0;
font-weight:400}
.plate th{font-weight:600;white-space:normal;max-width:150px;vertical-align:bottom}.plate img{max-width:none}
.plate .marked span{color:var(--go);font-weight:600}.plate .marked img{outline:3px solid var(--go)}
@media(max-width:640px){main,body>footer{padding:24px 16px}.lead{font-size:1.3rem}section,details{margin-top:40px}
.broad{display:none}.slim{display:block}.row{grid-template-columns:repeat(4,1fr)}.row img:nth-child(n+5){display:none}
.numbers{grid-template-columns:1fr 1fr;gap:10px}.numbers div{padding:10px 12px}.numbers b{font-size:1.5rem}
dl:not(.numbers){grid-template-columns:1fr;gap:0}dl:not(.numbers) dd{margin-bottom:10px}
th,td{padding:7px 10px 7px 0}.film img{width:76px}.film span{max-width:76px}}
@media(prefers-reduced-motion:reduce){.clock button{display:none}}
@media print{:root{color-scheme:light}@page{margin:14mm}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
body{font-size:10pt;background:#fff}main,body>footer{max-width:none;padding:0}.lead{font-size:16pt}
section,details{margin-top:22pt}h2,caption{break-after:avoid}
figure,tr,.numbers,.lanes>div,.beside>div,.grid{break-inside:avoid}
.moving{display:none}.wide{overflow:visible}table{font-size:8pt}td.n{white-space:normal}
td:not(.n),tbody th,thead th.n{min-width:0}th,td{padding:3pt 5pt 3pt 0}
.broad{display:block}.slim{display:none}.row{grid-template-columns:repeat(8,1fr)}.row img{display:block!important}
.numbers{grid-template-columns:repeat(4,1fr)}.numbers b{font-size:16pt}.grids{grid-template-columns:1fr 1fr}
.film img{width:22mm}.film span{max-width:22mm}
details::details-content{content-visibility:visible;block-size:auto}}
"""
