"""The node table in Chinese: what build.py makes locales/zh and the Chinese help pages from.

INPUTS and OUTPUTS are by name; a node's own entry in NODE_INPUTS goes before the shared one.
"""

TITLES = {
    "LanceKitModelLoader": ("Lance 模型加载器", "从 models/lance 文件夹中查找并加载 Lance 检查点（浮点或 4 位）。"),
    "LanceKitTextToImage": ("Lance 文生图", "根据文字生成图片。"),
    "LanceKitTextToVideo": ("Lance 文生视频", "根据文字生成视频。"),
    "LanceKitImageToVideo": ("Lance 图生视频", "生成以一张图片开头的视频。"),
    "LanceKitImageEdit": ("Lance 图像编辑", "按指令修改图片。"),
    "LanceKitVideoEdit": ("Lance 视频编辑", "按指令修改视频。"),
    "LanceKitImageUnderstanding": ("Lance 图像理解", "回答关于图片的问题。"),
    "LanceKitVideoUnderstanding": ("Lance 视频理解", "回答关于视频的问题。"),
    "LanceKitUnload": ("Lance 卸载", "释放 Lance 模型占用的全部显存和内存。"),
    "LanceKitSelfCheck": ("Lance 自检", "报告版本、设备、模型、官方源码的位置以及缺少的内容。"),
}
HELP = {
    "LanceKitModelLoader": "按文件夹内容而不是名称识别检查点：`awq_meta.json` 是 INT4，`nvfp4_meta.json` 是 NVFP4，"
                           "`llm_config.json` 加 `model.safetensors` 是浮点模型。所有注册为 `lance` 的文件夹都会"
                           "被搜索，包括 `extra_model_paths.yaml` 中的。ViT、VAE、配置和分词器取自检查点旁边，"
                           "或另一份相符的 Lance 下载。\n\n没有任何模型时使用内置的 lance-nano：它以 112 x 112 画圆、"
                           "方块、三角形、十字和数字，用于试运行工作流。",
    "LanceKitTextToImage": "批次中第 n 张图片的种子是 seed + n - 1，因此每一张都可以单独重画。",
    "LanceKitTextToVideo": "需要 Lance_3B_Video。时间和内存随 宽 x 高 x 帧数 增长：请先用 360p 和较少的帧。",
    "LanceKitImageToVideo": "需要 Lance_3B_Video。视频采用图片的比例：21:9、16:9、4:3、1:1、3:4 或 9:16。",
    "LanceKitImageEdit": "结果的尺寸是预设中最适合该图片的一档，而不是图片原来的尺寸。",
    "LanceKitVideoEdit": "需要 Lance_3B_Video。超过 6 秒的视频，模型看到的每秒不足 12 帧，均匀分布在全片；"
                         "结果的帧数与之相同，时长不变。",
    "LanceKitImageUnderstanding": "温度为 0 时，同一张图片、同一个问题总是得到同一个回答。",
    "LanceKitVideoUnderstanding": "需要 Lance_3B_Video。温度为 0 时，同一段视频、同一个问题总是得到同一个回答。",
    "LanceKitUnload": "之后有节点需要时，模型会自动重新加载。",
    "LanceKitSelfCheck": "出问题时先运行它，并把报告附在问题反馈中。",
}
INPUTS = {
    "flavor": ("型号", "使用哪个 Lance：图像模型、视频模型，或内置的小模型 lance-nano。"
               "auto 取第一个已安装的，都没有则用 lance-nano。"),
    "precision": ("精度", "使用哪种权重。auto：在 Blackwell GPU 上优先 NVFP4，否则 INT4，"
                  "再否则 bf16（仅限已安装的）。"),
    "checkpoint": ("检查点", "auto，或找到的某个文件夹。"),
    "device": ("设备", "auto 为 ComfyUI 自己的选择。"),
    "mode": ("模式", "用于 4 位权重。ondemand：保持小体积，每一步解包。cached：只解包一次，速度和大小与 bf16 相同。"),
    "keep_loaded": ("保持加载", "关闭：每个节点使用模型之后释放全部内存。"),
    "offload": ("卸载到内存", "auto：需要空间时由 ComfyUI 把语言模型、ViT 和 VAE 移到内存。"
                "after_use：用完立即让出 GPU。"),
    "vae_tiling": ("VAE 分块", "把大画面分成重叠的块解码：内存少得多，结果略有不同。"),
    "kernel": ("计算内核", "mode 为 ondemand 时如何计算 4 位权重。auto：本机上最快的。"
               "reference：纯 PyTorch，很慢，用于对比。native、triton、comfy_kitchen：只用这一种，不可用则报错。"
               "native_w4a8：用于 CPU，激活值也舍入到 8 位，出图更快，精度略低。"
               "nvfp4_w4a4：用于 Blackwell GPU 上的 NVFP4，激活值也舍入到 4 位，会损失质量；"
               "在其他设备上为缓慢的模拟。"),
    "loras": ("LoRA 文件", "models/loras 中的 LoRA 文件，每行一个：文件名、文件名:0.8，或按专家 文件名:und=0.5,gen=1。"
              "也可用于 4 位权重。"),
    "model": ("模型", "来自 Lance 模型加载器。"),
    "prompt": ("提示词", "要生成什么。"),
    "size": ("尺寸", "宽 x 高。auto 为官方尺寸；lance-nano 为 112x112。"),
    "width": ("宽度", "仅用于 size: custom。16 的倍数。"),
    "height": ("高度", "仅用于 size: custom。16 的倍数。"),
    "batch": ("批次", "图片数量，种子从 seed 起依次递增。"),
    "steps": ("步数", "去噪步数。官方设置为 30；时间与之成正比。"),
    "cfg": ("引导强度 (cfg)", "文字的引导强度。1 关闭引导，时间减半。"),
    "seed": ("种子", "噪声的种子。同一种子在任何设备上噪声相同。"),
    "timestep_shift": ("时间步偏移", "日程向高噪声步骤偏移的程度，这些步骤决定构图。"),
    "cfg_start": ("引导起点 t", "在此时间及以下关闭引导（1 是噪声，0 是成品）。"),
    "cfg_end": ("引导终点 t", "在此时间以上关闭引导。"),
    "low_memory": ("省内存", "引导的两次计算先后进行：内存更少，结果相同。"),
    "solver": ("求解器", "euler 为官方方法。ab2（二阶 Adams-Bashforth）代价相同，结果更接近精确解。"),
    "reuse": ("速度复用", "一步算出的速度可供后续步骤使用多久。0：官方方式，每步都计算。"
              "0.1：计算量不到一半，画面略有变化。"),
    "cfg_renorm": ("引导归一化", "引导使速度变长时如何缩回：按整幅画面、逐格，或不缩回。"),
    "frames": ("帧数", "视频长度；4 的倍数加 1。Lance 以每秒 12 帧训练。"),
    "fps": ("每秒帧数", "视频标记的帧率；不改变画面。"),
    "image": ("图像", "输入图片；批次中的每一张都会处理。"),
    "instruction": ("指令", "要修改什么。"),
    "resolution": ("分辨率", "输入以大约多大的尺寸给模型看；auto 为官方预设，lance-nano 为 112。"),
    "video": ("视频", "视频；连接它或 frames。"),
    "source_fps": ("输入帧率", "以帧输入时的帧率；视频自带帧率。"),
    "max_frames": ("最多帧数", "模型最多看多少帧。每秒取 12 帧，超过 6 秒的视频均匀取帧。"),
    "question": ("问题", "要问什么。"),
    "system": ("系统提示", "系统提示词；默认是官方的问答提示。"),
    "max_new_tokens": ("最大新词元数", "回答的最大长度，以词元计。"),
    "temperature": ("温度", "0：总取最可能的词元（官方做法）。大于 0：随机抽取，越高越自由。"),
    "top_p": ("核采样 (top_p)", "只在合计达到此份额的最可能词元中抽取。"),
    "after": ("之后", "连接必须先完成的内容；原样传出。"),
}
_FRAMES = ("帧", "以帧批次给出的视频；连接它或 video。")
_DRAWS = {"seed": ("种子", "抽取的种子；温度为 0 时不起作用。")}
NODE_INPUTS = {
    "LanceKitImageUnderstanding": _DRAWS,
    "LanceKitImageToVideo": {"image": ("图像", "第一帧；裁剪到最接近的官方比例。")},
    "LanceKitVideoEdit": {"frames": _FRAMES, "fps": ("每秒帧数", "仅在关闭“保持时长”时使用：结果标记的帧率。"),
                          "keep_length": ("保持时长", "结果与源视频一样长，帧率随之而定，并保留声音。"
                                          "关闭：按“每秒帧数”标记，且没有声音。")},
    "LanceKitVideoUnderstanding": _DRAWS | {"frames": _FRAMES},
}
OUTPUTS = {
    "model": ("模型", "供所有其他 Lance 节点使用。"),
    "info": ("信息", "加载了什么、来自哪里、为什么。"),
    "image": ("图像", "图片；批次时为全部图片。"),
    "video": ("视频", "供 Save Video 使用。"),
    "frames": ("帧", "视频的帧，作为批次。"),
    "latent": ("潜变量", "供 ComfyUI 自带节点使用：用 Wan 2.2 VAE 的 VAE Decode，或 Save Latent。"),
    "answer": ("回答", "每张图片或每段视频一个回答。"),
    "after": ("之后", "原样传出的输入。"),
    "report": ("报告", "文本报告。"),
}
WORDS = {"input": "输入", "output": "输出", "type": "类型", "default": "默认值", "range": "范围", "meaning": "含义",
         "required": "必需"}
